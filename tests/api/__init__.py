"""Requests that the gateway's OpenAPI document allows and forbids, by Schemathesis."""
