"""Cards, library, index and selection: which adapters fit a prompt."""
