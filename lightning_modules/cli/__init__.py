"""The `imbsam` command: LightningCLI with our classes, defaults and one-line errors."""
