"""The subcommands of tools/surgery.py: each module adds its own with `add`."""
