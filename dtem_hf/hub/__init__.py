"""Adapters as files and Hub repositories: bounded reading, cards, publishing."""
