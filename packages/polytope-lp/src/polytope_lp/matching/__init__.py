"""Matching problems: one or a few coupling rows per edge, one capped box per source, solved by dual ascent."""
