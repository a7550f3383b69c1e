"""What several tools share: results, plots, a server to measure, progress, command-line options."""
