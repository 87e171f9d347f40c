"""The recipe: schema, sections, contradictions, parsing, error messages, and the shipped TOML.

Does not know how anything is run.
"""
