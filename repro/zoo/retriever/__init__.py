"""The retriever: a small Llama that really retrieves, with the recipe that trained it."""
