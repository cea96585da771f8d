"""Reading compiled programs, memory and time models, hardware, and the search over strategies."""
