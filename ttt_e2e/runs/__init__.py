"""A run's directory, metrics and files; what may change at resume; keeping secrets out; the watchdog for slow steps."""
