"""The learning-rate desk: plan, find, sweep, suggest, scale, lessons."""
