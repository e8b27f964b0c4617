"""What was measured. From the root of the repository: `python -m benchmarks.FOLDER.SCRIPT`."""
