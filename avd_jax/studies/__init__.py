"""Studies: runs trained, rolled out and measured side by side."""
