"""Ways to combine a source of prompts, SAM and the mask gallery."""
