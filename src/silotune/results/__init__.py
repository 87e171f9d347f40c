"""A finished run: summary, report page, model card, export, chat.

It does not know how the run was made.
"""
