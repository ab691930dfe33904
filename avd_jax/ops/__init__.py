"""Arrays to arrays: masks, attention, rotary angles, the KV cache."""
