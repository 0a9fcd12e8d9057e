"""How fast this machine trains and samples: fair timing, the plain path, and the report."""
