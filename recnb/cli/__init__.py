"""The command `recnb`: one module a subcommand. What these do is imported once they are called."""
