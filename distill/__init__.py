"""Training: data, teacher, Align-TI losses, trainer. Everything that needs gradients lives here."""
