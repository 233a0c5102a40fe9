"""Generated from proto/capo/v1 by `make proto`. Do not edit."""
