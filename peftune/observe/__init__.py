"""What a run says of itself: display, journal, trackers, manifest, charts."""
