"""Adapters as files and Hub repositories: reading with bounds, cards, publishing."""
