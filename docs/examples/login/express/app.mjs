// An Express application whose session opens the bridge's streams: BRIDGE_AUTH_URL=http://127.0.0.1:3000/bridge-login
//
// Run: npm install express express-session && node app.mjs 3000
// In your own application only the route /bridge-login is new.
import express from "express";
import session from "express-session";

const app = express();
app.use(session({ secret: "only-for-this-example", resave: false, saveUninitialized: false }));

// Says to the bridge whose session this is.
app.get("/bridge-login", (request, response) => {
  const { user, groups } = request.session;
  if (!user) return response.status(401).json({ detail: "Your session has ended. Please log in again." });
  response.json({ user, groups, expires_in: 60 });
});

// Stands for your login page.
app.get("/login", (request, response) => {
  request.session.user = request.query.user;
  request.session.groups = [request.query.group ?? []].flat();
  response.json({});
});

app.get("/logout", (request, response) => request.session.destroy(() => response.json({})));

app.listen(Number(process.argv[2]), "127.0.0.1");
