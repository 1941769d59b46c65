from zk0bot.federation import server_app

app = server_app.app
