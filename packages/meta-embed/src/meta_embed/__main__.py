from meta_embed.cli import main

if __name__ == "__main__":
    main()
