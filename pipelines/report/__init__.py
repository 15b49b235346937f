"""What people look at: thumbnails from the shards, plots, and self-contained HTML pages."""
