"""What the axes of an attention call mean, and how its queries and keys are seen."""
