"""Methods: one loss, and the histories it may be conditioned on."""
