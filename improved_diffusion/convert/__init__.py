"""Models in other formats: to and from diffusers, and the small folder that is published."""
