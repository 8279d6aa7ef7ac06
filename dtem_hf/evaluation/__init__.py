"""Measure merged models: accuracy, agreement with the unmerged model, multiply-adds and speed."""

from ..errors import need


need("evaluate", __name__)
