"""A ranking model put together from its configuration."""
