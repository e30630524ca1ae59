from liar_ext.cli import main

raise SystemExit(main())
