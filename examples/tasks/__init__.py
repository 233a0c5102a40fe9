"""Three small skills that capo-tiny does not have: training rows and held-out rows for example adapters."""
