"""How a run is doing: its signals in, findings out. Measures nothing and prints nothing."""
