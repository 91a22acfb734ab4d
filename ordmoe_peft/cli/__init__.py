"""The `ordmoe` command: a module a subcommand, no logic of its own."""
