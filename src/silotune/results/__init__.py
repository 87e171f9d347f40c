"""A finished run: summary, report page, model card, export, chat.

Does not know how the run was made.
"""
