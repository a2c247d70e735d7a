"""The command line: from words, files and recipes to a job."""
