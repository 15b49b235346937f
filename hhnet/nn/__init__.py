"""Networks and their training: backbones, hash layers, losses, centres."""
