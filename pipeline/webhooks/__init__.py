"""Webhooks: deliver alerts to configured endpoints, signed, each at its own pace."""
