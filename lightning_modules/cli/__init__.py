"""The command `imbsam`: LightningCLI with our classes, defaults and one-line errors."""
