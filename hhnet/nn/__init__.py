"""Networks and what trains them: backbones, hash layers, losses, centres."""
