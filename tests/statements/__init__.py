"""What each recipe computes, written down once more from its paper, in float64: what tests compare layers with."""
