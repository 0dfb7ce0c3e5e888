"""What `python -m utils` does beside the notebooks: each module is one subcommand, or part of one.

Nothing else imports from here.
"""
