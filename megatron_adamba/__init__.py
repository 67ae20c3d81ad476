"""An elastic hybrid training stack: nested attention and MLP layers around full-width Mamba layers."""

__version__ = "0.2.0"
