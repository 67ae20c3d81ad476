"""`python -m megatron_adamba`, the same as `adamba`."""

from megatron_adamba.commands.main import main

if __name__ == "__main__":
    main()
