"""From a micro-batch to every sample's exact gradient norm and the clipped sum."""
