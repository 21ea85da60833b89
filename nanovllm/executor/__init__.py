"""How a plan reaches the ranks that carry it out."""
