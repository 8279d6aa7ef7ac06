"""Measure merged models: accuracy, agreement with the unmerged model, multiply-adds, speed."""
