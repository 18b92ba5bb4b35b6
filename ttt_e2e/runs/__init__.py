"""What a run leaves on disk: its directory, what may change at resume, metrics, files, secrets; the watchdog."""
