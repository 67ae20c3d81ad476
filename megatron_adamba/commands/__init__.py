"""The `adamba` command: a file for each of its commands, which parses, calls the rooms below, and prints."""
