BEGIN TRANSACTION;
CREATE TABLE counts (
	area VARCHAR(12) NOT NULL, 
	"key" VARCHAR(160) NOT NULL, 
	count INTEGER NOT NULL, 
	PRIMARY KEY (area, "key")
);
INSERT INTO "counts" VALUES('turns','main',4);
INSERT INTO "counts" VALUES('turns','trainable',4);
INSERT INTO "counts" VALUES('judgements','pending',1);
INSERT INTO "counts" VALUES('verdicts','1',2);
INSERT INTO "counts" VALUES('judgements','done',3);
INSERT INTO "counts" VALUES('samples','ready',2);
INSERT INTO "counts" VALUES('verdicts','-1',1);
INSERT INTO "counts" VALUES('versions','candidate',1);
INSERT INTO "counts" VALUES('samples','trained',1);
INSERT INTO "counts" VALUES('episodes','open',1);
INSERT INTO "counts" VALUES('ready','main//0/-1/1',1);
INSERT INTO "counts" VALUES('ready','main//0/1/0',1);
CREATE TABLE decisions (
	seq INTEGER NOT NULL, 
	lineage VARCHAR(80) NOT NULL, 
	number INTEGER, 
	"after" INTEGER NOT NULL, 
	at FLOAT NOT NULL, paused_by VARCHAR(80), 
	PRIMARY KEY (seq)
);
INSERT INTO "decisions" VALUES(1,'main',NULL,1,9.0,NULL);
CREATE TABLE encryption (
	id INTEGER NOT NULL, 
	wrapped BLOB, 
	next_wrapped BLOB, 
	phase VARCHAR(40), 
	position TEXT, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE episodes (
	id VARCHAR(100) NOT NULL, 
	key_hash VARCHAR(40) NOT NULL, 
	lineage VARCHAR(80) NOT NULL, 
	environment VARCHAR(100) NOT NULL, 
	task BLOB NOT NULL, 
	task_key VARCHAR(32) NOT NULL, 
	group_id VARCHAR(100), 
	split VARCHAR(8) NOT NULL, 
	seed BIGINT, 
	max_calls INTEGER, 
	max_tokens INTEGER, 
	deadline_s FLOAT, 
	sampling TEXT NOT NULL, 
	metadata BLOB NOT NULL, 
	state VARCHAR(8) NOT NULL, 
	status VARCHAR(12), 
	outcome FLOAT, 
	opened_at FLOAT NOT NULL, 
	closed_at FLOAT, 
	version_min INTEGER, 
	version_max INTEGER, 
	calls INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	reason TEXT, 
	version INTEGER, 
	process FLOAT, 
	settled_at FLOAT, opener VARCHAR(100), 
	PRIMARY KEY (id), 
	UNIQUE (key_hash), 
	FOREIGN KEY(group_id) REFERENCES groups (id)
);
INSERT INTO "episodes" VALUES('e-old','73b5d3dda94d257c5ed0101b914f839c4d67469f','main','shell',X'A563DFC613CEE51887920C9F5964B663','6c59488456fa26242f17c14dcc1e7f93',NULL,'train',NULL,NULL,NULL,NULL,'{}',X'2AFB9B83F9314E5D029766197F539792','open',NULL,NULL,1.7960029983931756019e+09,NULL,NULL,NULL,0,0,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE feedback (
	turn VARCHAR(40) NOT NULL, 
	score INTEGER NOT NULL, 
	hint BLOB, 
	comment BLOB, 
	created_at FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	voted_score INTEGER, 
	voted_judge VARCHAR(40), client VARCHAR(60) DEFAULT '' NOT NULL, 
	PRIMARY KEY (turn), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
INSERT INTO "feedback" VALUES('turn_2',1,NULL,X'9A997F5760643811BF0A558934F56495',1000.0,1000.0,NULL,NULL,'');
CREATE TABLE groups (
	id VARCHAR(100) NOT NULL, 
	lineage VARCHAR(80) NOT NULL, 
	task_key VARCHAR(32) NOT NULL, 
	split VARCHAR(8) NOT NULL, 
	size INTEGER, 
	state VARCHAR(8) NOT NULL, 
	opened_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE judgements (
	turn VARCHAR(40) NOT NULL, 
	state VARCHAR(8) NOT NULL, 
	lease_until FLOAT, 
	not_before FLOAT NOT NULL, 
	attempts INTEGER NOT NULL, 
	reason TEXT, 
	task_end VARCHAR(40), 
	seq INTEGER, 
	PRIMARY KEY (turn), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
INSERT INTO "judgements" VALUES('turn_0','done',NULL,0.0,0,NULL,NULL,1);
INSERT INTO "judgements" VALUES('turn_1','done',NULL,0.0,0,NULL,NULL,2);
INSERT INTO "judgements" VALUES('turn_2','done',NULL,0.0,0,NULL,NULL,3);
INSERT INTO "judgements" VALUES('turn_3','pending',NULL,0.0,0,NULL,NULL,4);
CREATE TABLE keys (
	name VARCHAR(40) NOT NULL, 
	hash BLOB NOT NULL, 
	scopes TEXT NOT NULL, 
	lineage VARCHAR(80), 
	created_at FLOAT NOT NULL, 
	used_at FLOAT, 
	revoked_at FLOAT, 
	PRIMARY KEY (name), 
	UNIQUE (hash)
);
CREATE TABLE ledger (
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	kind VARCHAR(12) NOT NULL, 
	content TEXT NOT NULL, 
	hash BLOB NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "ledger" VALUES(1,1000.0,'version','{"lineage":"main","number":1,"parent":0,"sha256":"abababababababababababababababababababababababababababababababab","state":"candidate","reason":null,"metrics":{"loss":0.5},"turns":[["turn_0",1,false,null]]}',X'ACE9EF590946D066C3BE88BA0DF4625FED886F9D34D33C7DB7C8DE17C69BC04B');
CREATE TABLE next_states (
	turn VARCHAR(40) NOT NULL, 
	seq INTEGER NOT NULL, 
	source VARCHAR(16) NOT NULL, 
	text BLOB NOT NULL, 
	trust FLOAT NOT NULL, 
	PRIMARY KEY (turn, seq), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
INSERT INTO "next_states" VALUES('turn_0',0,'user',X'4740F025CFE4D06051620EF349990227',0.9);
INSERT INTO "next_states" VALUES('turn_1',0,'user',X'CC9E1A4DED0BFB445E1C3A26D77124F3',0.9);
INSERT INTO "next_states" VALUES('turn_2',0,'user',X'9A155B17B99F359ACB51041060420331',0.9);
INSERT INTO "next_states" VALUES('turn_3',0,'user',X'BE3D6302E6FCFFCDDC1050F44069AEC7',0.9);
CREATE TABLE reviews (
	seq INTEGER NOT NULL, 
	turn VARCHAR(40) NOT NULL, 
	client VARCHAR(60) DEFAULT '' NOT NULL, 
	score INTEGER NOT NULL, 
	hint BLOB, 
	comment BLOB, 
	reason VARCHAR(16) NOT NULL, 
	at FLOAT NOT NULL, 
	PRIMARY KEY (seq), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
CREATE TABLE rewards (
	seq INTEGER NOT NULL, 
	episode VARCHAR(100) NOT NULL, 
	turn VARCHAR(40), 
	name VARCHAR(100) NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	value FLOAT NOT NULL, 
	source VARCHAR(100), 
	at FLOAT NOT NULL, 
	PRIMARY KEY (seq), 
	FOREIGN KEY(episode) REFERENCES episodes (id), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
CREATE TABLE roles (
	name VARCHAR(120) NOT NULL, 
	epoch INTEGER NOT NULL, 
	holder VARCHAR(200) NOT NULL, 
	since FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE samples (
	turn VARCHAR(40) NOT NULL, 
	lineage VARCHAR(80) NOT NULL, 
	state VARCHAR(8) NOT NULL, 
	policy_version INTEGER, 
	score INTEGER NOT NULL, 
	hinted BOOLEAN NOT NULL, 
	batch VARCHAR(40), 
	trained_in INTEGER, 
	reason TEXT, 
	seq INTEGER, 
	screened BOOLEAN, advantage FLOAT, client VARCHAR(60) DEFAULT '' NOT NULL, source VARCHAR(16), 
	PRIMARY KEY (turn), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
INSERT INTO "samples" VALUES('turn_0','main','trained',0,1,0,'b',1,NULL,1,NULL,NULL,'',NULL);
INSERT INTO "samples" VALUES('turn_1','main','ready',0,-1,1,NULL,NULL,NULL,2,NULL,NULL,'',NULL);
INSERT INTO "samples" VALUES('turn_2','main','ready',0,1,0,NULL,NULL,NULL,3,NULL,NULL,'',NULL);
CREATE TABLE schema_version (
	version INTEGER
);
INSERT INTO "schema_version" VALUES(5);
CREATE TABLE spending (
	at FLOAT NOT NULL, 
	calls INTEGER NOT NULL, 
	tokens INTEGER NOT NULL
);
CREATE TABLE texts (
	hash BLOB NOT NULL, 
	uses INTEGER NOT NULL, 
	base BLOB, 
	stored BLOB NOT NULL, 
	PRIMARY KEY (hash)
);
INSERT INTO "texts" VALUES(X'8DD751B35B9EE52CDE93FDF40D46C692',1,NULL,X'28B52FFD20263101007B22726F6C65223A2275736572222C22636F6E74656E74223A227175657374696F6E2030227D');
INSERT INTO "texts" VALUES(X'C0D2DA563612FF48BB0911A4CF744DE8',1,NULL,X'28B52FFD20139900007B2274656D7065726174757265223A312E307D');
INSERT INTO "texts" VALUES(X'D0D93603629D0ED5A3C6C7A4D2F83CEF',1,NULL,X'28B52FFD20294901007B22726F6C65223A22617373697374616E74222C22636F6E74656E74223A22616E737765722030227D');
INSERT INTO "texts" VALUES(X'F7B82346D0477CFCE1AD03B7051B00D7',1,NULL,X'28B52FFD200C610000010203000000000000000000');
INSERT INTO "texts" VALUES(X'4740F025CFE4D06051620EF349990227',1,NULL,X'28B52FFD20084100007468616E6B732030');
INSERT INTO "texts" VALUES(X'DC029E3D795DE528A2CAE8EC106FB95B',1,NULL,X'28B52FFD20263101007B22726F6C65223A2275736572222C22636F6E74656E74223A227175657374696F6E2031227D');
INSERT INTO "texts" VALUES(X'BB669701A7C768717DD0DC07BAF5D91F',1,NULL,X'28B52FFD20294901007B22726F6C65223A22617373697374616E74222C22636F6E74656E74223A22616E737765722031227D');
INSERT INTO "texts" VALUES(X'CC9E1A4DED0BFB445E1C3A26D77124F3',1,NULL,X'28B52FFD20084100007468616E6B732031');
INSERT INTO "texts" VALUES(X'3B4EC88562EA167081262284A6BE1E44',1,NULL,X'28B52FFD20263101007B22726F6C65223A2275736572222C22636F6E74656E74223A227175657374696F6E2032227D');
INSERT INTO "texts" VALUES(X'771F55FFF94129BA5A2377A8A528D9B8',1,NULL,X'28B52FFD20294901007B22726F6C65223A22617373697374616E74222C22636F6E74656E74223A22616E737765722032227D');
INSERT INTO "texts" VALUES(X'9A155B17B99F359ACB51041060420331',1,NULL,X'28B52FFD20084100007468616E6B732032');
INSERT INTO "texts" VALUES(X'5610362E02F320DAAAF746D8E460C8DD',1,NULL,X'28B52FFD20263101007B22726F6C65223A2275736572222C22636F6E74656E74223A227175657374696F6E2033227D');
INSERT INTO "texts" VALUES(X'FD6C3D61ED256F1A8B48CA128B56D01C',1,NULL,X'28B52FFD20294901007B22726F6C65223A22617373697374616E74222C22636F6E74656E74223A22616E737765722033227D');
INSERT INTO "texts" VALUES(X'BE3D6302E6FCFFCDDC1050F44069AEC7',1,NULL,X'28B52FFD20084100007468616E6B732033');
INSERT INTO "texts" VALUES(X'99BD2B1CC24DA1A8D10A0442E9E90022',1,NULL,X'28B52FFD2017B90000416E7377657220696E206F6E652073656E74656E63652E');
INSERT INTO "texts" VALUES(X'4433735C598595EFA80DBAC1556B0F71',1,NULL,X'28B52FFD200C610000010209000000000000000000');
INSERT INTO "texts" VALUES(X'9A997F5760643811BF0A558934F56495',1,NULL,X'28B52FFD20042100006E696365');
INSERT INTO "texts" VALUES(X'A563DFC613CEE51887920C9F5964B663',1,NULL,X'28B52FFD200D69000066696E64207468652066696C65');
INSERT INTO "texts" VALUES(X'2AFB9B83F9314E5D029766197F539792',1,NULL,X'28B52FFD20021100007B7D');
CREATE TABLE turns (
	seq INTEGER NOT NULL, 
	id VARCHAR(40) NOT NULL, 
	session VARCHAR(200) NOT NULL, 
	idx INTEGER NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	lineage VARCHAR(80) NOT NULL, 
	policy_version INTEGER, 
	client_model VARCHAR(200) NOT NULL, 
	messages BLOB NOT NULL, 
	tools BLOB, 
	rest BLOB NOT NULL, 
	reply BLOB NOT NULL, 
	finish_reason VARCHAR(40), 
	prompt_ids BLOB, 
	completion_ids BLOB, 
	behaviour_logprobs BLOB, 
	sampling TEXT NOT NULL, 
	started_at FLOAT NOT NULL, 
	first_token_s FLOAT, 
	total_s FLOAT NOT NULL, 
	untrainable TEXT, 
	parent VARCHAR(40), 
	continued BOOLEAN NOT NULL, 
	chain_key BLOB NOT NULL, 
	reply_key BLOB NOT NULL, 
	client_session VARCHAR(200), 
	place BLOB, 
	replaced_by VARCHAR(40), 
	context_key BLOB, episode VARCHAR(100), step INTEGER, client VARCHAR(60) DEFAULT '' NOT NULL, engine VARCHAR(300), 
	PRIMARY KEY (seq), 
	UNIQUE (id)
);
INSERT INTO "turns" VALUES(1,'turn_0','s',0,'main','main',0,'m',X'8DD751B35B9EE52CDE93FDF40D46C692',NULL,X'C0D2DA563612FF48BB0911A4CF744DE8',X'D0D93603629D0ED5A3C6C7A4D2F83CEF','stop',X'F7B82346D0477CFCE1AD03B7051B00D7',X'28B52FFD20084100000405000000000000',X'28B52FFD2011890000649A9999999999B9BF000000000000D0BF','{}',1.0,0.1,0.2,NULL,NULL,1,X'00000000000000000000000000000000',X'6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B',NULL,NULL,NULL,NULL,NULL,NULL,'',NULL);
INSERT INTO "turns" VALUES(2,'turn_1','s',1,'main','main',0,'m',X'DC029E3D795DE528A2CAE8EC106FB95B',NULL,X'C0D2DA563612FF48BB0911A4CF744DE8',X'BB669701A7C768717DD0DC07BAF5D91F','stop',X'F7B82346D0477CFCE1AD03B7051B00D7',X'28B52FFD20084100000406000000000000',X'28B52FFD2011890000649A9999999999B9BF000000000000D0BF','{}',2.0,0.1,0.2,NULL,'turn_0',1,X'01010101010101010101010101010101',X'6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B',NULL,NULL,NULL,NULL,NULL,NULL,'',NULL);
INSERT INTO "turns" VALUES(3,'turn_2','s',2,'main','main',0,'m',X'3B4EC88562EA167081262284A6BE1E44',NULL,X'C0D2DA563612FF48BB0911A4CF744DE8',X'771F55FFF94129BA5A2377A8A528D9B8','stop',X'F7B82346D0477CFCE1AD03B7051B00D7',X'28B52FFD20084100000407000000000000',X'28B52FFD2011890000649A9999999999B9BF000000000000D0BF','{}',3.0,0.1,0.2,NULL,'turn_1',1,X'02020202020202020202020202020202',X'6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B',NULL,NULL,NULL,NULL,NULL,NULL,'',NULL);
INSERT INTO "turns" VALUES(4,'turn_3','s',3,'main','main',0,'m',X'5610362E02F320DAAAF746D8E460C8DD',NULL,X'C0D2DA563612FF48BB0911A4CF744DE8',X'FD6C3D61ED256F1A8B48CA128B56D01C','stop',X'F7B82346D0477CFCE1AD03B7051B00D7',X'28B52FFD20084100000408000000000000',X'28B52FFD2011890000649A9999999999B9BF000000000000D0BF','{}',4.0,0.1,0.2,NULL,'turn_2',1,X'03030303030303030303030303030303',X'6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B6B',NULL,NULL,NULL,NULL,NULL,NULL,'',NULL);
CREATE TABLE verdicts (
	turn VARCHAR(40) NOT NULL, 
	votes TEXT NOT NULL, 
	score INTEGER NOT NULL, 
	judge VARCHAR(40) NOT NULL, 
	hint BLOB, 
	hinted_prompt_ids BLOB, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (turn), 
	FOREIGN KEY(turn) REFERENCES turns (id)
);
INSERT INTO "verdicts" VALUES('turn_0','[1,1,0]',1,'rules',NULL,NULL,1000.0);
INSERT INTO "verdicts" VALUES('turn_1','[-1]',-1,'rules',X'99BD2B1CC24DA1A8D10A0442E9E90022',X'4433735C598595EFA80DBAC1556B0F71',1000.0);
INSERT INTO "verdicts" VALUES('turn_2','[]',1,'feedback',NULL,NULL,1000.0);
CREATE TABLE versions (
	lineage VARCHAR(80) NOT NULL, 
	number INTEGER NOT NULL, 
	parent INTEGER, 
	path TEXT, 
	sha256 VARCHAR(64), 
	samples INTEGER NOT NULL, 
	state VARCHAR(12) NOT NULL, 
	metrics TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	reason TEXT, 
	PRIMARY KEY (lineage, number)
);
INSERT INTO "versions" VALUES('main',1,0,'/adapters/1','abababababababababababababababababababababababababababababababab',1,'candidate','{"loss":0.5}',1000.0,NULL);
CREATE TABLE workers (
	id VARCHAR(20) NOT NULL, 
	beat FLOAT NOT NULL, 
	adapters TEXT NOT NULL, 
	counts TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE INDEX turns_by_place ON turns (place) WHERE place IS NOT NULL;
CREATE INDEX turns_by_chain ON turns (chain_key, seq);
CREATE INDEX turns_by_context ON turns (context_key, seq) WHERE context_key IS NOT NULL;
CREATE INDEX turns_by_session ON turns (session, idx);
CREATE INDEX turns_by_client_session ON turns (client_session, seq) WHERE client_session IS NOT NULL;
CREATE INDEX turns_by_reply ON turns (reply_key, seq);
CREATE INDEX spending_by_time ON spending (at);
CREATE INDEX versions_by_state ON versions (state, lineage);
CREATE INDEX decisions_by_lineage ON decisions (lineage, seq);
CREATE INDEX judgements_by_due ON judgements (state, not_before, seq);
CREATE INDEX samples_by_turn ON samples (lineage, seq);
CREATE INDEX samples_by_training ON samples (trained_in, lineage, seq) WHERE trained_in IS NOT NULL;
CREATE INDEX samples_by_age ON samples (lineage, state, screened, seq);
CREATE TRIGGER turns_changed AFTER UPDATE OF kind, replaced_by, untrainable ON turns BEGIN UPDATE counts SET count = count - 1 WHERE area = 'turns' AND key = OLD.kind AND OLD.replaced_by IS NULL; DELETE FROM counts WHERE area = 'turns' AND key = OLD.kind AND count = 0; UPDATE counts SET count = count - 1 WHERE area = 'turns' AND key = 'trainable' AND OLD.untrainable IS NULL; DELETE FROM counts WHERE area = 'turns' AND key = 'trainable' AND count = 0; INSERT INTO counts (area, key, count) SELECT 'turns', NEW.kind, 1 WHERE NEW.replaced_by IS NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; INSERT INTO counts (area, key, count) SELECT 'turns', 'trainable', 1 WHERE NEW.untrainable IS NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER turns_removed AFTER DELETE ON turns BEGIN UPDATE counts SET count = count - 1 WHERE area = 'turns' AND key = OLD.kind AND OLD.replaced_by IS NULL; DELETE FROM counts WHERE area = 'turns' AND key = OLD.kind AND count = 0; UPDATE counts SET count = count - 1 WHERE area = 'turns' AND key = 'trainable' AND OLD.untrainable IS NULL; DELETE FROM counts WHERE area = 'turns' AND key = 'trainable' AND count = 0; END;
CREATE TRIGGER judgements_added AFTER INSERT ON judgements BEGIN INSERT INTO counts (area, key, count) SELECT 'judgements', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER judgements_changed AFTER UPDATE OF state ON judgements BEGIN UPDATE counts SET count = count - 1 WHERE area = 'judgements' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'judgements' AND key = OLD.state AND count = 0; INSERT INTO counts (area, key, count) SELECT 'judgements', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER judgements_removed AFTER DELETE ON judgements BEGIN UPDATE counts SET count = count - 1 WHERE area = 'judgements' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'judgements' AND key = OLD.state AND count = 0; END;
CREATE TRIGGER verdicts_added AFTER INSERT ON verdicts BEGIN INSERT INTO counts (area, key, count) SELECT 'verdicts', NEW.score, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER verdicts_changed AFTER UPDATE OF score ON verdicts BEGIN UPDATE counts SET count = count - 1 WHERE area = 'verdicts' AND key = OLD.score AND 1; DELETE FROM counts WHERE area = 'verdicts' AND key = OLD.score AND count = 0; INSERT INTO counts (area, key, count) SELECT 'verdicts', NEW.score, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER verdicts_removed AFTER DELETE ON verdicts BEGIN UPDATE counts SET count = count - 1 WHERE area = 'verdicts' AND key = OLD.score AND 1; DELETE FROM counts WHERE area = 'verdicts' AND key = OLD.score AND count = 0; END;
CREATE TRIGGER versions_added AFTER INSERT ON versions BEGIN INSERT INTO counts (area, key, count) SELECT 'versions', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER versions_changed AFTER UPDATE OF state ON versions BEGIN UPDATE counts SET count = count - 1 WHERE area = 'versions' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'versions' AND key = OLD.state AND count = 0; INSERT INTO counts (area, key, count) SELECT 'versions', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER versions_removed AFTER DELETE ON versions BEGIN UPDATE counts SET count = count - 1 WHERE area = 'versions' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'versions' AND key = OLD.state AND count = 0; END;
CREATE TRIGGER feedback_added AFTER INSERT ON feedback BEGIN INSERT INTO counts (area, key, count) SELECT 'labels', NEW.voted_judge || '/' || NEW.score || '/' || NEW.voted_score, 1 WHERE NEW.voted_judge IS NOT NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER feedback_changed AFTER UPDATE OF score, voted_judge, voted_score ON feedback BEGIN UPDATE counts SET count = count - 1 WHERE area = 'labels' AND key = OLD.voted_judge || '/' || OLD.score || '/' || OLD.voted_score AND OLD.voted_judge IS NOT NULL; DELETE FROM counts WHERE area = 'labels' AND key = OLD.voted_judge || '/' || OLD.score || '/' || OLD.voted_score AND count = 0; INSERT INTO counts (area, key, count) SELECT 'labels', NEW.voted_judge || '/' || NEW.score || '/' || NEW.voted_score, 1 WHERE NEW.voted_judge IS NOT NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER feedback_removed AFTER DELETE ON feedback BEGIN UPDATE counts SET count = count - 1 WHERE area = 'labels' AND key = OLD.voted_judge || '/' || OLD.score || '/' || OLD.voted_score AND OLD.voted_judge IS NOT NULL; DELETE FROM counts WHERE area = 'labels' AND key = OLD.voted_judge || '/' || OLD.score || '/' || OLD.voted_score AND count = 0; END;
CREATE INDEX groups_by_state ON groups (state, split);
CREATE INDEX episodes_by_group ON episodes (group_id) WHERE group_id IS NOT NULL;
CREATE INDEX episodes_by_settling ON episodes (settled_at, lineage) WHERE settled_at IS NOT NULL;
CREATE INDEX episodes_by_state ON episodes (state, split);
CREATE INDEX rewards_by_episode ON rewards (episode);
CREATE INDEX turns_by_episode ON turns (episode, step) WHERE episode IS NOT NULL;
CREATE TRIGGER episodes_added AFTER INSERT ON episodes BEGIN INSERT INTO counts (area, key, count) SELECT 'episodes', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER episodes_changed AFTER UPDATE OF state ON episodes BEGIN UPDATE counts SET count = count - 1 WHERE area = 'episodes' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'episodes' AND key = OLD.state AND count = 0; INSERT INTO counts (area, key, count) SELECT 'episodes', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER episodes_removed AFTER DELETE ON episodes BEGIN UPDATE counts SET count = count - 1 WHERE area = 'episodes' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'episodes' AND key = OLD.state AND count = 0; END;
CREATE TRIGGER groups_added AFTER INSERT ON groups BEGIN INSERT INTO counts (area, key, count) SELECT 'groups', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER groups_changed AFTER UPDATE OF state ON groups BEGIN UPDATE counts SET count = count - 1 WHERE area = 'groups' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'groups' AND key = OLD.state AND count = 0; INSERT INTO counts (area, key, count) SELECT 'groups', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER groups_removed AFTER DELETE ON groups BEGIN UPDATE counts SET count = count - 1 WHERE area = 'groups' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'groups' AND key = OLD.state AND count = 0; END;
CREATE TRIGGER rewards_added AFTER INSERT ON rewards BEGIN INSERT INTO counts (area, key, count) SELECT 'rewards', NEW.kind, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER rewards_changed AFTER UPDATE OF kind ON rewards BEGIN UPDATE counts SET count = count - 1 WHERE area = 'rewards' AND key = OLD.kind AND 1; DELETE FROM counts WHERE area = 'rewards' AND key = OLD.kind AND count = 0; INSERT INTO counts (area, key, count) SELECT 'rewards', NEW.kind, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER rewards_removed AFTER DELETE ON rewards BEGIN UPDATE counts SET count = count - 1 WHERE area = 'rewards' AND key = OLD.kind AND 1; DELETE FROM counts WHERE area = 'rewards' AND key = OLD.kind AND count = 0; END;
CREATE INDEX reviews_by_client ON reviews (client);
CREATE UNIQUE INDEX reviews_by_turn ON reviews (turn, client);
CREATE INDEX samples_by_kind ON samples (lineage, state, client, policy_version, score, hinted, seq);
CREATE INDEX feedback_by_client ON feedback (client, updated_at);
CREATE INDEX texts_by_base ON texts (base) WHERE base IS NOT NULL;
CREATE TRIGGER samples_added AFTER INSERT ON samples BEGIN INSERT INTO counts (area, key, count) SELECT 'samples', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; INSERT INTO counts (area, key, count) SELECT 'ready', NEW.lineage || '/' || NEW.client || '/' || NEW.policy_version || '/' || NEW.score || '/' || NEW.hinted, 1 WHERE NEW.state = 'ready' AND NEW.policy_version IS NOT NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER samples_changed AFTER UPDATE OF state, lineage, client, policy_version, score, hinted ON samples BEGIN UPDATE counts SET count = count - 1 WHERE area = 'samples' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'samples' AND key = OLD.state AND count = 0; UPDATE counts SET count = count - 1 WHERE area = 'ready' AND key = OLD.lineage || '/' || OLD.client || '/' || OLD.policy_version || '/' || OLD.score || '/' || OLD.hinted AND OLD.state = 'ready' AND OLD.policy_version IS NOT NULL; DELETE FROM counts WHERE area = 'ready' AND key = OLD.lineage || '/' || OLD.client || '/' || OLD.policy_version || '/' || OLD.score || '/' || OLD.hinted AND count = 0; INSERT INTO counts (area, key, count) SELECT 'samples', NEW.state, 1 WHERE 1 ON CONFLICT (area, key) DO UPDATE SET count = count + 1; INSERT INTO counts (area, key, count) SELECT 'ready', NEW.lineage || '/' || NEW.client || '/' || NEW.policy_version || '/' || NEW.score || '/' || NEW.hinted, 1 WHERE NEW.state = 'ready' AND NEW.policy_version IS NOT NULL ON CONFLICT (area, key) DO UPDATE SET count = count + 1; END;
CREATE TRIGGER samples_removed AFTER DELETE ON samples BEGIN UPDATE counts SET count = count - 1 WHERE area = 'samples' AND key = OLD.state AND 1; DELETE FROM counts WHERE area = 'samples' AND key = OLD.state AND count = 0; UPDATE counts SET count = count - 1 WHERE area = 'ready' AND key = OLD.lineage || '/' || OLD.client || '/' || OLD.policy_version || '/' || OLD.score || '/' || OLD.hinted AND OLD.state = 'ready' AND OLD.policy_version IS NOT NULL; DELETE FROM counts WHERE area = 'ready' AND key = OLD.lineage || '/' || OLD.client || '/' || OLD.policy_version || '/' || OLD.score || '/' || OLD.hinted AND count = 0; END;
COMMIT;
