"""What several commands share: models, runs, launchers, samples, tasks."""
