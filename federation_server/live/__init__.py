"""What runs: sessions, the writer, the dispatcher, the notifier, the sweeper."""
