"""What every room must agree on: artefact manifest, pixels, prompts, checkpoints, scores, errors."""
