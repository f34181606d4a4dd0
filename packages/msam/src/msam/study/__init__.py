"""Training runs that compare methods: data, flatness, cost, pictures."""
